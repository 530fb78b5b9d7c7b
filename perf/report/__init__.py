"""What people look at: tables, plots and pages from saved runs."""
