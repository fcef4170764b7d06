"""What is wrong with a data set: images that splits share, classes too small, files that are no images."""
