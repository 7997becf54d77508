"""Running a partitioned graph: stages on lanes, microbatches through them."""
