"""From labelled images to the rows of a database."""
