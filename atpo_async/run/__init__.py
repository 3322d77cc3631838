"""One run on disk and its processes: folder, metrics, endpoints, scratch files."""
