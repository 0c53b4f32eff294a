"""What works on whole models of layers."""
