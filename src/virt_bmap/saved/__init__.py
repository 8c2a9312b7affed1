"""Maps and tables as files: the text map both ways, Parquet, and the results of commands in each form."""
