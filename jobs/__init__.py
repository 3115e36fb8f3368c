"""Entry points of Ray jobs: the command line's verbs, on the cluster that runs the job."""
