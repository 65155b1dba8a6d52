"""What is trained: modules that turn a batch into its loss, and the data of which those batches are made."""
