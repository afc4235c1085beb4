"""What each method minimises, the train step, Magnet batches, and k-means++ between epochs."""
