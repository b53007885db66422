"""What stands between the network and the rooms: who may ask, from where, how much, and how slowly."""
