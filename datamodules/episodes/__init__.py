"""From images in memory to episodes: which are drawn, how they are held, gathered and augmented."""
