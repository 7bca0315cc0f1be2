"""The model that holds mixtures: host, batch, objective, loading."""
