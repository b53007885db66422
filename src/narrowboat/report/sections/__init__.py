"""What a report says of each kind of record: what to notice, pictures, tables, facts."""
