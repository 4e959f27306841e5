"""What every benchmark needs: results and their files, rates of products, memory at its peak, collectives counted."""
