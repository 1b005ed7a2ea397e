"""Remote Ray clusters: `laion-rdm submit`, training on Ray, and files for Docker and Kubernetes."""
