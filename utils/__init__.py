"""What two scripts share, one concept a module."""
