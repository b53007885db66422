// Columns of numbers of which the oldest rows are overwritten: what the page keeps never grows.

class Ring {
  /** @param {number} capacity rows @param {Object<string, Function>} columns a typed array's class by name */
  constructor(capacity, columns) {
    this.capacity = capacity;
    this.columns = Object.entries(columns).map(([name, Kind]) => (this[name] = new Kind(capacity)));
    this.clear();
  }

  clear() {
    this.size = this.next = 0;
  }

  /** One row, in the order of the columns. */
  push(...values) {
    for (let k = 0; k < values.length; k++) this.columns[k][this.next] = values[k];
    this.next = (this.next + 1) % this.capacity;
    this.size = Math.min(this.size + 1, this.capacity);
  }

  /** Where the row `back` rows before the newest (0) stands in the columns. */
  at(back) {
    return (this.next - 1 - back + this.capacity) % this.capacity;
  }
}
