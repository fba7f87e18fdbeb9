"""PySpark jobs of kellm: SWING pairs, Wikipedia dumps, and linking items to pages.

Every transform is a function from DataFrames to a DataFrame; `stages` does the input and output. Importing this
package loads no pyspark.
"""
