"""What `raygrpo bench` runs. Each module prints a table, or JSON, from one run on the machine at hand."""
