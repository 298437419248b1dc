"""The ClientApp: message in, private local training, noised update out."""
