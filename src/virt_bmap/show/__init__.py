"""A map as a person looks at it: reports and SQL."""
