"""What a run shows: its report, comparisons, the pages of tokens, the papers' figures. All of it works offline."""
