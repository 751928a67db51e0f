"""What exact search is made of: bounds for groups of rows, and rows measured after all."""
