"""A model over the rows of tables: here, in Ray Data and in Spark."""
