"""What is asked of a map, and of the disk below it: who owns,
what lies there, what did, what is free, is it whole."""
