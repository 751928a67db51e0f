"""Maps of an image that no row of a database lends the weights of."""
