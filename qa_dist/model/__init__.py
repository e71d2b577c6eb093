"""The encoder: families, loading, adapters, attention, quantisation, and the folder of a trained model."""
