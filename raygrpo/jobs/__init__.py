"""Runs as Ray jobs.

    package.py    which files of a project travel to the cluster, and what becomes of a run's paths there
    client.py     submit, follow, stop: what a user's machine asks of a cluster (RayJobs, through Ray's own client)
    driver.py     what `raygrpo train` finds out and insists on when it runs on a cluster

Only driver.py is known to train.py; the others serve the commands.
"""
