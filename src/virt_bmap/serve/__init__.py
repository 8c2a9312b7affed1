"""A disk served to a guest by nbdkit, with its log, for as long as anyone reads it."""
