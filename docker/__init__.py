"""What starts a training on a cluster: the image, its entrypoint, and job files for Kubernetes and Slurm.

Python standard library only, except for `rank` and `health`, which run beside an installed clusterface.
"""
