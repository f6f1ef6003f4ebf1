"""Run any OCI image as a microVM from Trio."""
