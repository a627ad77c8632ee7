"""What a trained model is used for: recommendations, explanations, exported embeddings."""
