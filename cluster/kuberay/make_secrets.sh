#!/usr/bin/env bash
# Makes the secrets that the manifests name, with random values, in the namespace raygrpo; existing ones stay as they are.
# Options go to kubectl, e.g. --dry-run=client -o yaml to see them.
set -euo pipefail

secret() { # NAME KEY=VALUE...
    local name=$1 literals=()
    shift
    for pair in "$@"; do literals+=("--from-literal=$pair"); done
    kubectl create secret generic "$name" --namespace raygrpo "${literals[@]}" "${options[@]}"
}

random() { openssl rand -hex 32; }

options=("$@")
secret raygrpo-ray-token "auth_token=$(random)"
secret raygrpo-valkey "password=$(random)"
secret raygrpo-postgres "password=$(random)"
key=$(random) password=$(random)
identity='{"name": "mlflow", "credentials": [{"accessKey": "'$key'", "secretKey": "'$password'"}], "actions": ["Admin"]}'
secret raygrpo-object-store "access_key=$key" "secret_key=$password" "s3.json={\"identities\": [$identity]}"
