"""Which example comes when, as a function of (seed, step), and how it is read by then."""
