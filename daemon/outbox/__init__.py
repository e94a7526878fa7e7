"""What leaves for a PACS: durable in the database, built, sent, tried again."""
