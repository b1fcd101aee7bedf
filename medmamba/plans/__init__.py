"""What the data are (fingerprint), what will be done with them (plan), and why."""
