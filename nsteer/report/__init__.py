"""What people look at: claims, figures, the page, and what is printed to a terminal."""
