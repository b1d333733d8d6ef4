// Search in pages opened from disk (file://), where browsers refuse web workers and reading data: what the search plugin's
// worker does, done in the page. The plugin's own script takes this for a worker; served over HTTP it has a real one.
"use strict";

if (location.protocol === "file:") {
  window.Worker = class {
    constructor(address) {
      this.folder = address.slice(0, address.lastIndexOf("/") + 1);
      this.ready = null; // a promise of the index, which is made at the first query
    }

    async postMessage(message) {
      if (message.init) {
        await this.load("search_index.js");
        this.answer({ config: window.searchIndex.config });
        this.answer({ allowSearch: true });
      } else {
        this.ready ??= this.index();
        const find = await this.ready;
        this.asked = message.query;
        const results = find(message.query);
        if (this.asked === message.query) this.answer({ results });
      }
    }

    answer(data) {
      this.onmessage?.({ data });
    }

    load(file) {
      return new Promise((loaded, failed) => {
        const script = document.createElement("script");
        Object.assign(script, { src: this.folder + file, onload: loaded, onerror: failed });
        document.head.append(script);
      });
    }

    async index() {
      await this.load("lunr.js");
      const { config, docs } = window.searchIndex;
      lunr.tokenizer.separator = new RegExp(config.separator);
      const index = lunr((made) => {
        made.ref("location");
        made.field("title", { boost: 10 });
        made.field("text");
        docs.forEach((one) => made.add(one));
      });
      const known = new Map(docs.map((one) => [one.location, { ...one, summary: one.text.slice(0, 200) }]));
      return (query) => {
        try {
          return index.search(query).map((found) => known.get(found.ref));
        } catch (error) {
          if (error instanceof lunr.QueryParseError) return []; // half a query, such as "title:"
          throw error;
        }
      };
    }
  };
}
