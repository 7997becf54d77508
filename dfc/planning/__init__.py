"""What runs where and when; and the protocols by which planning asks others to run and measure."""
