"""What several formats share, and nothing that names one of them."""
