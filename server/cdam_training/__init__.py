"""Training heads and last blocks of the models that are served, from labelled images; what comes out, the server loads."""
