"""Other tools' formats in and out, the hub, dashboards."""
