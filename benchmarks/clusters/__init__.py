"""K-means in several ways, parts of the cluster service, faces with planted faults."""
