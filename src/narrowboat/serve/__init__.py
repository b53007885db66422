"""Tasks over the network: a gateway that keeps deadlines, and a page on which to watch them. No torch here."""
