"""From a file of records to edit requests: fields, pictures, supervision."""
