"""Ways that part and meet again, and networks without some of them."""
