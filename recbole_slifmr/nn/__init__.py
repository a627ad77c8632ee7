"""The mathematics: graphs, sparse products, encoders, losses. Torch and scipy alone, nothing of RecBole."""
