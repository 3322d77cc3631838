"""Scripts and manifests that start a run's roles on a cluster: Slurm's and Kubernetes'."""
