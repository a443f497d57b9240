"""What every room needs: records, files, the run folder, the ledger, models, chat templates, engines."""
