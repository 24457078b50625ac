"""The server on a Ray cluster: an ingress that receives requests, and replicas with a model each."""
