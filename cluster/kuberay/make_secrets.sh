#!/usr/bin/env bash
# Makes the secrets that the manifests name, with random values, in the namespace raygrpo. Those that exist already stay as
# they are, so that it can be run again. Options go to `kubectl create`; with --dry-run=client -o yaml it shows all four.
set -euo pipefail

case " $* " in
    *" --dry-run"*) existing="" ;;
    *) existing=$(kubectl get secrets --namespace raygrpo --output name) ;;
esac
options=("$@")

secret() { # NAME KEY=VALUE...
    local name=$1 arguments=()
    shift
    if grep -qxF "secret/$name" <<<"$existing"; then
        echo "secret/$name exists already" >&2
        return
    fi
    for pair in "$@"; do arguments+=("--from-literal=$pair"); done
    # The ${...+...}: in bash 3.2, which macOS has, an empty array counts as unset.
    kubectl create secret generic "$name" --namespace raygrpo "${arguments[@]}" ${options[@]+"${options[@]}"}
}

random() { openssl rand -hex 32; }

secret raygrpo-ray-token "auth_token=$(random)"
secret raygrpo-valkey "password=$(random)"
secret raygrpo-postgres "password=$(random)"
key=$(random) password=$(random)
identity='{"name": "mlflow", "credentials": [{"accessKey": "'$key'", "secretKey": "'$password'"}], "actions": ["Admin"]}'
secret raygrpo-object-store "access_key=$key" "secret_key=$password" "s3.json={\"identities\": [$identity]}"
