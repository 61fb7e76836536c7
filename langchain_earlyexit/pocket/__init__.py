"""The pocket reasoner: a tiny reasoning model, its data, recipe, weights and card."""
