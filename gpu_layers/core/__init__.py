"""What both floors need: windows, masks, moments, dtypes, Philox."""
