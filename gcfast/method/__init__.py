"""What is differentiated, and by what algebra."""
